/** How to start another of our programs by its path: from the sources under tsx, or from build/. */
import { extname } from 'node:path'
import { fileURLToPath } from 'node:url'

/** A program beside this one in the tree, named by URL without its extension. */
export function scriptCommand(withoutExtension: URL): [string, ...string[]] {
  const extension = extname(import.meta.url)
  // Under tsx the loader stands in execArgv; without it a .ts file would not start.
  const loader =
    extension === '.ts' ? process.execArgv.filter((arg) => !arg.startsWith('--test')) : []
  return [process.execPath, ...loader, fileURLToPath(withoutExtension) + extension]
}
