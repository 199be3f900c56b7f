/** One Attach stream by TLS, until its Welcome: what a worker does first, and all that it does. */
import { credentials, Metadata, type ServiceError } from '@grpc/grpc-js'
import { JoinedHost, tlsChannelOptions } from '../../client/joined-host.js'
import type { Hello } from '../../proto/gen/tunemesh/v1/Hello.js'
import type { ToWorker__Output } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import type { Welcome__Output } from '../../proto/gen/tunemesh/v1/Welcome.js'
import { errorOfRpc } from '../../proto/rpc-error.js'
import { WorkerService } from '../../proto/services.js'
import { version } from '../../proto/version.js'

/** @param who a joined host, or somebody with the owner's token and no certificate */
export async function attachOnce(
  address: string,
  who: JoinedHost | { ca: string; token: string },
  hello: Hello = {},
): Promise<Welcome__Output> {
  const isHost = who instanceof JoinedHost
  const channel = isHost ? who.credentials() : credentials.createSsl(Buffer.from(who.ca))
  const service = new WorkerService(address, channel, tlsChannelOptions)
  try {
    return await welcomed(service, hello, isHost ? '' : who.token)
  } finally {
    service.close()
  }
}

/** Over a channel that stays, and waits for its connection where it has lost it. */
export async function welcomed(
  service: InstanceType<typeof WorkerService>,
  hello: Hello,
  token = '',
): Promise<Welcome__Output> {
  const metadata = new Metadata({ waitForReady: true })
  if (token !== '') metadata.set('authorization', `Bearer ${token}`)
  const call = service.attach(metadata)
  try {
    return await new Promise((resolve, reject) => {
      call.on('data', ({ welcome }: ToWorker__Output) => welcome && resolve(welcome))
      call.on('error', (error: ServiceError) => reject(errorOfRpc(error)))
      call.write({ hello: { version, host: 'test', ...hello } })
    })
  } finally {
    call.cancel()
  }
}
