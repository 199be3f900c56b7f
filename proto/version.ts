/** The version in package.json: both ends of an Attach stream must have the same. */
import { existsSync, readFileSync } from 'node:fs'

/** One folder up in the source tree, two from build/proto. */
const packageFile = ['../package.json', '../../package.json']
  .map((path) => new URL(path, import.meta.url))
  .find((url) => existsSync(url))

export const version: string = packageFile
  ? (JSON.parse(readFileSync(packageFile, 'utf8')) as { version: string }).version
  : '0.0.0'
