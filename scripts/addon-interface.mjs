// Writes the stamp of the addon's interface into both of its sides, native/bindings and worker: a
// hash of every name that the bindings read or give. It changes with the interface alone, so that
// an addon built earlier is told apart from one that is too old. A test compares.
import { createHash } from 'node:crypto'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { top } from './tools.mjs'

const headerName = 'addon_interface.h'

/** Of native/bindings as it stands. */
export function interfaceStamp() {
  const folder = join(top, 'native/bindings')
  const names = new Set()
  for (const file of readdirSync(folder)) {
    if (file === headerName) continue
    const text = readFileSync(join(folder, file), 'utf8')
    for (const [, name] of text.matchAll(/"([A-Za-z][A-Za-z0-9]*)"/g)) names.add(name)
  }
  return createHash('sha256')
    .update([...names].sort().join('\n'))
    .digest('hex')
    .slice(0, 12)
}

/** Path below the repository's top → text. */
export const stampedFiles = (stamp) => ({
  [`native/bindings/${headerName}`]: `// Written by: node scripts/addon-interface.mjs
#pragma once

namespace tunemesh {

// Of the names that JavaScript and the addon share; worker/addon-interface.ts has the same.
inline constexpr const char* kAddonInterface = "${stamp}";

}  // namespace tunemesh
`,
  'worker/addon-interface.ts': `/** Written by: node scripts/addon-interface.mjs */
export const addonInterface = '${stamp}'
`,
})

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  for (const [path, text] of Object.entries(stampedFiles(interfaceStamp()))) {
    writeFileSync(join(top, path), text)
  }
}
