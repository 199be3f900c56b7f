import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

/** The project's own folder, whether a test runs from the sources or from build/. */
export const projectTop = findTop(new URL('.', import.meta.url))

function findTop(folder: URL): string {
  if (existsSync(new URL('package-lock.json', folder))) return fileURLToPath(folder)
  return findTop(new URL('..', folder))
}
