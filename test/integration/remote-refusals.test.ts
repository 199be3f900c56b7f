/** Who is not let in by TLS, and what they are told. */
import assert from 'node:assert/strict'
import { generateKeyPairSync, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdirSync, readFileSync, rmSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { type Client, connectivityState } from '@grpc/grpc-js'
import { connect } from '../../client/client.js'
import { joinMesh } from '../../client/join.js'
import { JoinedHost, tlsChannelOptions } from '../../client/joined-host.js'
import { callOnce } from '../../client/rpc.js'
import { CertificateAuthority } from '../../coordinator/certificate-authority.js'
import { JoinTokens } from '../../coordinator/join-tokens.js'
import { decodeJoinToken, encodeJoinToken } from '../../proto/join-token.js'
import { connectNats } from '../../proto/nats-client.js'
import { BlobService, JobService, JoinService, WorkerService } from '../../proto/services.js'
import type { TlsIdentity } from '../../proto/tls.js'
import { attachOnce, welcomed } from './attach-once.js'
import { CliProcess, runCli } from './cli-process.js'
import { addressIn, JoinedWorker, joinLineOf, refusal } from './joined-worker.js'
import { launch, TestCoordinator } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { TcpForward } from './tcp-forward.js'

const listen = '127.0.0.2:0'
const dayMs = 24 * 3_600_000
const hourMs = 3_600_000

/** Cuts the link, and waits until the client has noticed. */
async function cutOff(client: Client, link: TcpForward): Promise<void> {
  const { READY } = connectivityState
  const noticed = new Promise<void>((resolve) => {
    client.getChannel().watchConnectivityState(READY, Number.POSITIVE_INFINITY, () => resolve())
  })
  link.cut()
  await noticed
}

describe('a coordinator that listens by TLS', { timeout: 240_000 }, () => {
  const stateDir = temporaryFolder()
  const folders: string[] = [stateDir]
  let coordinator: TestCoordinator
  let address = ''
  let expired: Buffer
  let fingerprint: Buffer

  const newFolder = () => {
    const folder = temporaryFolder()
    folders.push(folder)
    return folder
  }
  const refused = async (url: string, token: string | null, folder = newFolder()) =>
    refusal(new JoinedWorker(url, token, folder))
  const url = () => `https://${address}`
  const authority = () => CertificateAuthority.open(join(stateDir, 'tls'), Date.now())

  /** What a host would keep of a join, with a certificate by `signer`. */
  function hostBy(
    signer: CertificateAuthority,
    { lifeMs = dayMs, saysMs }: { lifeMs?: number; saysMs?: number } = {},
    folder = newFolder(),
  ): JoinedHost {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
    const nowMs = Date.now()
    const { certificate, hostId } = signer.worker(publicKey, { nowMs, lifeMs })
    return JoinedHost.keep(JoinedHost.pathFor(folder, address), {
      address,
      hostId,
      ca: authority().certificate,
      certificate,
      key: privateKey.export({ type: 'pkcs8', format: 'pem' }).toString(),
      expiresMs: nowMs + (saysMs ?? lifeMs),
      renewMs: nowMs + dayMs,
    })
  }
  const stateDirOf = ({ path }: JoinedHost) => join(path, '..', '..')

  before(async () => {
    const tlsDir = join(stateDir, 'tls')
    mkdirSync(tlsDir, { recursive: true })
    const tokens = new JoinTokens(join(tlsDir, 'tokens.json'), () => Date.now() - 2 * hourMs)
    expired = tokens.issue({ ttlMs: hourMs, uses: 1 }).secret
    coordinator = await TestCoordinator.open({ listen, stateDir })
    const line = joinLineOf(coordinator)
    address = addressIn(line)
    fingerprint = decodeJoinToken(line.token).fingerprint
  })
  after(async () => {
    await coordinator.close()
    for (const folder of folders) rmSync(folder, { recursive: true, force: true })
  })

  it('refuses a token of a secret that it did not give out', async () => {
    const token = encodeJoinToken({ fingerprint, secret: randomBytes(16) })
    assert.match(await refused(url(), token), /JOIN_REFUSED.*unknown here.*tunemesh token/)
  })

  it('refuses an expired token, and says when it expired', async () => {
    const token = encodeJoinToken({ fingerprint, secret: expired })
    assert.match(await refused(url(), token), /JOIN_REFUSED.*has expired at 20.*tunemesh token/)
  })

  it('refuses a token that another host has used', async () => {
    const { token } = await coordinator.client.newToken({ ttlMs: hourMs, uses: 1 })
    const first = new JoinedWorker(url(), token, newFolder())
    await first.process.until(/Joining .* as h-/)
    assert.match(await refused(url(), token), /JOIN_REFUSED.*was used already.*tunemesh token/)
    await first.leave()
  })

  it('lets one of twenty in who use a token at the same moment', async () => {
    const { token } = await coordinator.client.newToken({ ttlMs: hourMs, uses: 1 })
    const hostName = 'one of many'
    const tries = Array.from({ length: 20 }, () =>
      joinMesh({ address, token, hostName, stateDir: newFolder(), nowMs: Date.now() }),
    )
    const ended = await Promise.allSettled(tries)
    const refusals = ended.filter((end) => end.status === 'rejected')
    assert.equal(ended.length - refusals.length, 1)
    for (const { reason } of refusals) assert.match(String(reason), /was used already/)
  })

  it('is told no secret where the token names another authority', async () => {
    const { token } = await coordinator.client.newToken({ ttlMs: hourMs, uses: 1 })
    const { secret } = decodeJoinToken(token)
    const wrong = encodeJoinToken({ fingerprint: randomBytes(32), secret })
    assert.match(await refused(url(), wrong), /CERTIFICATE_INVALID.*Nothing was sent.*join line/)
    // It would be used up otherwise.
    const worker = new JoinedWorker(url(), token, newFolder())
    await worker.process.until(/Joining .* as h-/)
    await worker.leave()
  })

  it('refuses a damaged token before it is asked', async () => {
    const { token } = joinLineOf(coordinator)
    const damaged = `${token.slice(0, -1)}${token.endsWith('A') ? 'B' : 'A'}`
    assert.match(await refused(url(), damaged), /JOIN_REFUSED.*missing or changed/)
  })

  it('refuses a certificate of another authority', async () => {
    const foreign = CertificateAuthority.open(join(newFolder(), 'tls'), Date.now())
    const host = hostBy(foreign)
    const said = await refused(url(), null, stateDirOf(host))
    assert.match(said, /CERTIFICATE_INVALID.*no certificate of this mesh.*Join again/)
  })

  it('refuses an expired certificate, which its host notices first', async () => {
    const known = hostBy(authority(), { lifeMs: -hourMs })
    assert.match(
      await refused(url(), null, stateDirOf(known)),
      /CERTIFICATE_INVALID.*has expired at.*new token/,
    )
    const unknown = hostBy(authority(), { lifeMs: -hourMs, saysMs: dayMs })
    assert.match(
      await refused(url(), null, stateDirOf(unknown)),
      /CERTIFICATE_INVALID.*has expired.*Join again/,
    )
  })

  it('tells a plain-text client and a plain-text worker to speak TLS', async () => {
    const named = ['--token-file', join(stateDir, 'token')]
    const client = await runCli(['jobs', '--server', address, ...named])
    assert.equal(client.code, 2)
    assert.match(client.stderr, /TLS_REQUIRED.*--ca/)
    const folder = newFolder()
    const worker = await runCli(['worker', '--join', address, ...named, '--state-dir', folder])
    assert.equal(worker.code, 2)
    assert.match(worker.stderr, /TLS_REQUIRED.*tunemesh token/)
  })

  it('is not looked for by TLS on its plain-text port, nor where nobody is', async () => {
    const { token } = joinLineOf(coordinator)
    const plain = await refused(`https://${coordinator.ready.grpc}`, token)
    assert.match(plain, /TLS_REQUIRED.*does not speak TLS/)
    const hurried = ['--wait', '0.1']
    const nobody = new JoinedWorker('https://127.0.0.3:8472', token, newFolder(), hurried)
    const { code, stderr } = await nobody.process.ended
    assert.equal(code, 4)
    assert.match(stderr, /COORDINATOR_UNREACHABLE.*firewall/)
  })

  it('is not joined without a token, nor by http', async () => {
    assert.match(await refused(url(), null), /TLS_REQUIRED.*has not joined/)
    assert.match(await refused('coordinator.invalid:8472', null), /TLS_REQUIRED.*has not joined/)
    assert.match(await refused(`http://${address}`, null), /TLS_REQUIRED.*https:/)
  })

  it("leaves jobs and tokens to the owner, whatever a worker's certificate", async () => {
    const host = hostBy(authority())
    const context = { token: '', deadlineMs: 10_000 }
    const owners = { code: 'NOT_AUTHENTICATED', message: /owner's token/ }
    const jobs = new JobService(address, host.credentials(), tlsChannelOptions)
    const joins = new JoinService(address, host.credentials(), tlsChannelOptions)
    const blobs = new BlobService(address, host.credentials(), tlsChannelOptions)
    await assert.rejects(
      callOnce((m, o, done) => jobs.list({}, m, o, done), context),
      owners,
    )
    const limits = { ttlMs: hourMs, uses: 1 }
    await assert.rejects(
      callOnce((m, o, done) => joins.newToken(limits, m, o, done), context),
      owners,
    )
    const digest = `sha256:${'0'.repeat(64)}`
    const stat = callOnce<{ complete: boolean }>(
      (m, o, done) => blobs.stat({ digest }, m, o, done as never),
      context,
    )
    assert.equal((await stat).complete, false)
    for (const service of [jobs, joins, blobs]) service.close()
  })

  it("takes the owner's token by TLS for jobs, and no other, and for no worker", async () => {
    const ca = join(stateDir, 'tls', 'ca.pem')
    const tlsRoots = readFileSync(ca)
    const stranger = connect({ address, token: 'wrong', tlsRoots })
    await assert.rejects(stranger.list(), { code: 'NOT_AUTHENTICATED' })
    stranger.close()
    const named = ['--server', address, '--token-file', join(stateDir, 'token'), '--ca', ca]
    const listed = await runCli(['jobs', ...named])
    assert.equal(listed.code, 0, listed.stderr)
    const owner = { ca: tlsRoots.toString(), token: coordinator.ready.token }
    await assert.rejects(attachOnce(address, owner), { code: 'CERTIFICATE_INVALID' })
  })

  it('gives an id back to the host that had it, and to no other', async () => {
    const [one, other] = [hostBy(authority()), hostBy(authority())]
    const first = await attachOnce(address, one)
    const previous = { previousWorkerId: first.workerId, previousWorkerProof: first.workerProof }
    const again = await attachOnce(address, one, previous)
    assert.equal(again.workerId, first.workerId)
    const stolen = await attachOnce(address, other, previous)
    assert.notEqual(stolen.workerId, first.workerId)
    const { previousWorkerId } = previous
    const unproven = await attachOnce(address, one, { previousWorkerId, previousWorkerProof: '' })
    assert.notEqual(unproven.workerId, first.workerId)
  })

  it('renews a certificate after a third of its life, for all workers of the host', async () => {
    const folder = newFolder()
    const host = hostBy(authority(), { lifeMs: 3 * dayMs }, folder)
    const sibling = JoinedHost.read(host.path)
    const before = host.certificate
    assert.equal(await host.renewIfDue(Date.now()), false)
    assert.equal(await host.renewIfDue(Date.now() + dayMs + 1_000), true)
    assert.notEqual(host.certificate, before)
    const { workerId } = await attachOnce(address, host)
    assert.match(workerId, /^w-/)
    assert.equal(await sibling?.renewIfDue(Date.now()), false)
    assert.equal(sibling?.certificate, host.certificate)
  })

  it('is shown the newest certificate by a channel that lost its connection', async () => {
    const link = await TcpForward.open('127.0.0.3', '127.0.0.2', Number(address.split(':')[1]))
    const folder = newFolder()
    const host = hostBy(authority(), {}, folder)
    const there = address.replace('127.0.0.2', '127.0.0.3')
    const service = new WorkerService(there, host.credentials(), tlsChannelOptions)
    const { workerId, workerProof } = await welcomed(service, {})
    const previous = { previousWorkerId: workerId, previousWorkerProof: workerProof }
    await cutOff(service, link)
    assert.equal((await welcomed(service, previous)).workerId, workerId)
    // Another host's, as no renewal gives it: what the id is bound to tells which one was shown.
    const other = hostBy(authority(), { lifeMs: 2 * dayMs }, folder)
    await host.renewIfDue(Date.now())
    assert.equal(host.hostId, other.hostId)
    assert.equal((await welcomed(service, previous)).workerId, workerId)
    await cutOff(service, link)
    assert.notEqual((await welcomed(service, previous)).workerId, workerId)
    service.close()
    await link.close()
  })

  it('keeps the bus to those with a certificate of the mesh', async () => {
    const secrets = readFileSync(join(stateDir, 'nats', 'secrets.json'), 'utf8')
    const { port } = JSON.parse(secrets) as { port: number }
    const open = (tls: TlsIdentity | null) =>
      connectNats(
        () => ({ url: `nats://127.0.0.2:${port}`, user: 'w-a', credentials: null, tls }),
        {
          timeoutMs: 1,
          noEcho: true,
        },
      )
    const foreign = CertificateAuthority.open(join(newFolder(), 'tls'), Date.now())
    await assert.rejects(open(null), { message: /did not answer/ })
    await assert.rejects(open(hostBy(foreign)), { message: /did not answer/ })
    // Let in by its certificate, it still needs credentials of its own.
    await assert.rejects(open(hostBy(authority())), { message: /refuses the credentials of w-a/ })
  })

  it('prints a join line that works, for as many hosts as asked', async () => {
    const done = await runCli(['token', '--state-dir', stateDir, '--uses', '2', '--json'])
    assert.equal(done.code, 0, done.stderr)
    const line = JSON.parse(done.stdout) as { url: string; token: string }
    for (let host = 0; host < 2; host++) {
      const worker = new JoinedWorker(line.url, line.token, newFolder())
      await worker.process.until(/Joining .* as h-/)
      await worker.leave()
    }
    assert.match(await refused(line.url, line.token), /JOIN_REFUSED.*used already, by 2/)
    const ttl = await runCli(['token', '--state-dir', stateDir, '--token-ttl', '31d'])
    assert.equal(ttl.code, 2)
  })

  it('is not mistaken for another that answers at its address', async () => {
    const host = hostBy(authority())
    await coordinator.close()
    const other = await TestCoordinator.open({ listen: address })
    const said = await refused(url(), null, stateDirOf(host))
    assert.match(said, /CERTIFICATE_INVALID.*shows the authority sha256:.*set up anew/)
    await other.close()
    other.removeState()
  })
})

it('up --listen prints one join line, and stays', { timeout: 60_000 }, async () => {
  const stateDir = temporaryFolder()
  const own = ['--state-dir', stateDir, '--workers', '0', '--grpc-port', '0', '--no-dashboard']
  const up = new CliProcess(['up', ...own, '--listen', '127.0.0.2:0', '--token-ttl', '15m'])
  await up.until(
    /^Join +tunemesh worker --join https:\/\/127\.0\.0\.2:\d+ --token tmj1_[\w-]{70}$/m,
  )
  await up.until(/For one other host, until 20/)
  up.interrupt()
  assert.equal((await up.ended).code, 0)
  rmSync(stateDir, { recursive: true, force: true })
})

it('an address of another machine and a taken port are named', { timeout: 60_000 }, async () => {
  const stateDir = temporaryFolder()
  const failure = async (address: string) => {
    const { child, ready } = await launch(stateDir, { listen: address })
    await once(child, 'exit')
    return ready.error
  }
  const foreign = await failure('192.0.2.1')
  assert.equal(foreign?.code, 'JOB_INVALID')
  assert.match(foreign?.message ?? '', /192\.0\.2\.1 is no address of this machine.*0\.0\.0\.0/)
  const other = createServer()
  other.listen(0, '127.0.0.2')
  await once(other, 'listening')
  const { port } = other.address() as AddressInfo
  for (const own of [port, port - 1]) {
    const taken = await failure(`127.0.0.2:${own}`)
    assert.equal(taken?.code, 'PORT_TAKEN', taken?.message)
    assert.ok(taken?.message.includes(`Port ${port}`), taken?.message)
  }
  other.close()
  rmSync(stateDir, { recursive: true, force: true })
})

it('a coordinator on loopback gives out no join tokens', { timeout: 60_000 }, async () => {
  const coordinator = await TestCoordinator.open()
  assert.equal(coordinator.ready.join, null)
  const done = await runCli(['token', '--state-dir', coordinator.stateDir])
  assert.equal(done.code, 2)
  assert.match(done.stderr, /STATE_CONFLICT.*up --listen/)
  await coordinator.close()
  coordinator.removeState()
})
