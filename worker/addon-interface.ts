/** Written by: node scripts/addon-interface.mjs. Of the names that the addon shares with us. */
export const addonInterface = '3edc385f5a33'
