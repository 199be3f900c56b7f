/**
 * Finds a nats-server that is new enough. Nothing is downloaded here: `npm run setup` does that.
 */
import { TunemeshError } from '../proto/errors.js'
import {
  type NatsBinary,
  type NatsSearch,
  natsFloor,
  searchNatsServer,
} from '../proto/nats-search.js'

/**
 * @throws TunemeshError NATS_SERVER_MISSING, or NATS_SERVER_TOO_OLD where only older ones were
 *   found
 */
export async function findNatsServer(search: NatsSearch): Promise<NatsBinary> {
  const { found, tooOld } = await searchNatsServer(search)
  if (found) return found
  if (tooOld.length > 0) {
    const seen = tooOld.map(({ path, version }) => `${path} is ${version}`).join(', ')
    throw new TunemeshError(
      'NATS_SERVER_TOO_OLD',
      `nats-server must be at least ${natsFloor}: ${seen}. ` +
        'Run `npm run setup`, which puts a pinned version into the cache.',
    )
  }
  throw new TunemeshError(
    'NATS_SERVER_MISSING',
    search.explicit === ''
      ? `No nats-server ≥ ${natsFloor} on PATH, in the sbin folders or in ${search.cacheDir}. ` +
          'Run `npm run setup`, or name one by TUNEMESH_NATS_SERVER.'
      : `TUNEMESH_NATS_SERVER names ${search.explicit}, which does not run as a nats-server. ` +
          'Correct it, or unset it and run `npm run setup`.',
  )
}
