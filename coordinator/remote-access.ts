/** What `--listen` adds to a coordinator: its authority, its tokens, its certificates. */
import { hostname } from 'node:os'
import { join } from 'node:path'
import { experimental, type ServerCredentials } from '@grpc/grpc-js'
import { encodeJoinToken } from '../proto/join-token.js'
import type { TlsIdentity } from '../proto/tls.js'
import { CertificateAuthority } from './certificate-authority.js'
import { HostCalls } from './host-calls.js'
import { JoinTokens } from './join-tokens.js'
import { JoinedHosts } from './joined-hosts.js'
import { joinHost, type ListenAddress, serverNames } from './listen-address.js'
import type { NatsTls } from './nats-server.js'

export interface RemoteAccessOptions {
  /** Of the state: keys lie in it. */
  folder: string
  listen: ListenAddress
  /** How long a worker host's certificate counts. */
  certificateLifeMs: number
  /** Wall clock. */
  nowMs: () => number
}

export interface JoinLine {
  url: string
  token: string
  expiresMs: number
}

export class RemoteAccess {
  readonly authority: CertificateAuthority
  readonly tokens: JoinTokens
  readonly hosts: JoinedHosts
  /** Of worker hosts, under way. */
  readonly calls = new HostCalls()
  readonly server: TlsIdentity
  /** Of this machine's own clients of the bus. */
  readonly local: TlsIdentity
  /** Of gRPC, once it is bound. */
  boundPort = 0

  constructor(readonly options: RemoteAccessOptions) {
    const { folder, listen, nowMs, certificateLifeMs } = options
    this.authority = CertificateAuthority.open(folder, nowMs())
    this.tokens = new JoinTokens(join(folder, 'tokens.json'), nowMs)
    this.hosts = new JoinedHosts({ path: join(folder, 'hosts.json'), certificateLifeMs, nowMs })
    this.server = this.authority.server(serverNames(listen.host, hostname()), nowMs())
    this.local = this.authority.local(nowMs())
  }

  /** Beside gRPC, on the next port. */
  get natsTls(): NatsTls {
    const { host, port } = this.options.listen
    return { host, port: port === 0 ? 0 : port + 1, server: this.server, local: this.local }
  }

  get url(): string {
    return `https://${joinHost(this.options.listen.host)}:${this.boundPort}`
  }

  newToken(limits: { ttlMs: number; uses: number }): JoinLine {
    const { secret, expiresMs } = this.tokens.issue(limits)
    const { fingerprint } = this.authority
    return { url: this.url, token: encodeJoinToken({ fingerprint, secret }), expiresMs }
  }

  /**
   * Of the TLS port. A client certificate is asked for and not required: one that joins has none
   * yet. Who may call what is decided call by call (access.ts), so that a refusal has words.
   */
  serverCredentials(): ServerCredentials {
    const { ca, certificate, key } = this.server
    const provider = fixedCertificates({
      caCertificate: Buffer.from(ca),
      // With the authority behind it, so that one who joins can compare its fingerprint.
      certificate: Buffer.from(certificate + ca),
      privateKey: Buffer.from(key),
    })
    return experimental.createCertificateProviderServerCredentials(provider, provider, false)
  }
}

function fixedCertificates(
  update: experimental.CaCertificateUpdate & experimental.IdentityCertificateUpdate,
): experimental.CertificateProvider {
  // Not at once: gRPC looks at what it was told only after it has added its listener.
  const tell = (listener: (told: typeof update) => void) => process.nextTick(listener, update)
  return {
    addCaCertificateListener: tell,
    removeCaCertificateListener: () => {},
    addIdentityCertificateListener: tell,
    removeIdentityCertificateListener: () => {},
  }
}
