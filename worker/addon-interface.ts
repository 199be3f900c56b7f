/** Written by: node scripts/addon-interface.mjs. Of the names that the addon shares with us. */
export const addonInterface = 'cb4423f5127f'
