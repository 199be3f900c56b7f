/** How a worker speaks to its coordinator: in plain text on loopback, by TLS as a joined host. */
import { X509Certificate } from 'node:crypto'
import { credentials } from '@grpc/grpc-js'
import { assertLoopback } from '../client/client.js'
import { JoinedHost, tlsChannelOptions } from '../client/joined-host.js'
import { hostAndPort, pinnedAuthority, speaksTls } from '../client/tls-probe.js'
import { TunemeshError } from '../proto/errors.js'
import type { Welcome__Output as Welcome } from '../proto/gen/tunemesh/v1/Welcome.js'
import type { NatsAddress } from '../proto/nats-client.js'
import { channelOptions } from '../proto/services.js'
import { fingerprintOf, inAddress } from '../proto/tls.js'
import type { Access } from './attach-stream.js'

export interface CoordinatorAccess extends Access {
  /** Over a network, where a firewall may let one port through and not the other. */
  isRemote: boolean
  natsAddress(welcome: Welcome): NatsAddress
  /** @returns whether there is a new certificate */
  renewIfDue(nowMs: number): Promise<boolean>
}

/** @throws TunemeshError NOT_AUTHENTICATED: the address is not on this machine */
export function loopbackAccess(address: string, token: string): CoordinatorAccess {
  assertLoopback(address)
  return {
    isRemote: false,
    credentials: credentials.createInsecure(),
    channelOptions,
    token,
    natsAddress: (welcome) => ({
      url: welcome.natsUrl,
      user: welcome.workerId,
      credentials: welcome.nats,
      tls: welcome.natsTls,
    }),
    renewIfDue: async () => false,
    diagnose: async () => ((await speaksTls(address)) ? tlsOnly(address) : null),
  }
}

/** @throws TunemeshError CERTIFICATE_INVALID: nothing usable is kept, or it has expired */
export function joinedAccess(path: string, nowMs: number): CoordinatorAccess {
  const host = JoinedHost.read(path)
  if (host === null) throw notJoined(path)
  host.assertValid(nowMs)
  const authority = fingerprintOf(new X509Certificate(host.ca).raw)
  return {
    isRemote: true,
    credentials: host.credentials(),
    channelOptions: tlsChannelOptions,
    token: '',
    natsAddress: ({ natsUrl, workerId, nats }) => ({
      // The coordinator does not know by which name it is reached from here.
      url: `nats://${inAddress(hostAndPort(host.address).host)}:${new URL(natsUrl).port}`,
      user: workerId,
      credentials: nats,
      tls: host,
    }),
    renewIfDue: (now) => host.renewIfDue(now),
    diagnose: () =>
      pinnedAuthority(host.address, authority).then(
        () => null,
        (error: unknown) => (error instanceof TunemeshError ? error : null),
      ),
  }
}

const tlsOnly = (address: string) =>
  new TunemeshError(
    'TLS_REQUIRED',
    `${address} speaks TLS only. Join it as \`tunemesh worker --join https://${address} ` +
      '--token TOKEN`; `tunemesh token` on its machine prints the line.',
  )

const notJoined = (path: string) =>
  new TunemeshError(
    'CERTIFICATE_INVALID',
    `${path} holds no certificate. Join with the line that \`tunemesh up --listen\` printed.`,
  )
