/**
 * The native addon: found, loaded once, its errors turned into TunemeshError. worker/engine.ts and
 * its neighbours type what they call.
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import { addonInterface } from './addon-interface.js'

type NativeAddon = Record<string, (...values: unknown[]) => unknown>

let addon: NativeAddon | null = null

function loadAddon(): NativeAddon {
  addon ??= requireAddon()
  return addon
}

/** One call of the addon's functions, by name. */
export function callAddon<T>(name: string, ...values: unknown[]): T {
  return calling(() => {
    const call = loadAddon()[name]
    if (!call)
      throw new TunemeshError('ENGINE_MISSING', `the native engine has no ${name}: rebuild`)
    return call(...values) as T
  })
}

/** Errors of the addon carry a code of proto/errors.ts; the caller's stack is attached here. */
export function asTunemeshError(error: unknown): unknown {
  if (!(error instanceof Error) || !('code' in error) || !isErrorCode(error.code)) return error
  const subject = 'subject' in error && typeof error.subject === 'string' ? error.subject : ''
  const details = subject ? [subject] : []
  return new TunemeshError(error.code, error.message, { details, cause: error })
}

export function calling<T>(call: () => T): T {
  try {
    return call()
  } catch (error) {
    throw asTunemeshError(error)
  }
}

export async function settling<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call()
  } catch (error) {
    throw asTunemeshError(error)
  }
}

/** From build/worker/ the addon lies in build/native/, from the sources in ../build/native/. */
function requireAddon(): NativeAddon {
  const places = nativePlaces('tunemesh.node')
  const found = places.find((place) => existsSync(place))
  if (!found) {
    throw new TunemeshError(
      'ENGINE_MISSING',
      `the native engine is not built: neither ${places.join(' nor ')} exists. Run: npm run build`,
    )
  }
  const loaded = createRequire(import.meta.url)(found) as NativeAddon & { interface?: unknown }
  assertInterface(loaded.interface, found)
  return loaded
}

/**
 * An addon older or newer than this program would fail at each call, in words that help nobody.
 * @throws TunemeshError ENGINE_OUTDATED
 */
export function assertInterface(stamp: unknown, path: string): void {
  if (stamp === addonInterface) return
  const seen = typeof stamp === 'string' ? `interface ${stamp}` : 'no interface stamp'
  throw new TunemeshError(
    'ENGINE_OUTDATED',
    `the native engine ${path} has ${seen}, this program needs ${addonInterface}: they were ` +
      'built from different sources. Run: npm run build',
  )
}

/** Where a native file may lie, seen from here. */
export function nativePlaces(file: string): string[] {
  return [`../native/${file}`, `../build/native/${file}`].map((place) =>
    fileURLToPath(new URL(place, import.meta.url)),
  )
}
