/** Written by: node scripts/addon-interface.mjs */
export const addonInterface = 'b63a8335b6ef'
