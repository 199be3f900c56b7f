/** Written by: node scripts/addon-interface.mjs. Of the names that the addon shares with us. */
export const addonInterface = '5de2528396d4'
