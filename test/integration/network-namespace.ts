/**
 * Another host, as far as the kernel can make one: a network namespace behind a veth pair, or
 * behind a router that masquerades. Made and removed by the test; needs root.
 */
import { spawnSync } from 'node:child_process'

const run = (command: string): boolean => {
  const [program = '', ...args] = command.split(' ')
  return spawnSync(program, args, { stdio: 'ignore' }).status === 0
}

const mustRun = (command: string): void => {
  const [program = '', ...args] = command.split(' ')
  const done = spawnSync(program, args, { encoding: 'utf8' })
  if (done.status !== 0) throw new Error(`${command}: ${done.error?.message ?? done.stderr}`)
}

/** Why there can be none here; false: there can. */
export function namespacesMissing(): string | false {
  if (process.getuid?.() !== 0) return 'network namespaces need root'
  const name = `tm${process.pid}try`
  const isMade = run(`ip netns add ${name}`) && run(`ip -n ${name} link set lo up`)
  run(`ip netns delete ${name}`)
  return isMade ? false : 'this machine makes no network namespaces'
}

/** Why there can be no masquerading router here; false: there can. */
export function natMissing(): string | false {
  const missing = namespacesMissing()
  if (missing) return missing
  return run('nft --version') ? false : 'no nft is on the path'
}

export class NetworkNamespace {
  /** Of this machine, as the namespace sees it. */
  readonly hostAddress: string
  readonly #name = `tm${process.pid}`
  readonly #subnet: string

  private constructor() {
    this.#subnet = `10.231.${process.pid % 250}`
    this.hostAddress = `${this.#subnet}.1`
  }

  static open({ isBehindNat = false } = {}): NetworkNamespace {
    const namespace = new NetworkNamespace()
    try {
      if (isBehindNat) namespace.#makeBehindNat()
      else namespace.#make()
    } catch (error) {
      namespace.close()
      throw error
    }
    return namespace
  }

  /** Runs what follows in the namespace. */
  get wrapper(): string[] {
    return ['ip', 'netns', 'exec', this.#name]
  }

  /** Packets are lost silently while it is down: neither side is told. */
  setLink(isUp: boolean): void {
    mustRun(`ip link set ${this.#name}h ${isUp ? 'up' : 'down'}`)
  }

  close(): void {
    run(`ip link delete ${this.#name}h`)
    run(`ip netns delete ${this.#name}`)
    run(`ip netns delete ${this.#name}r`)
  }

  /** This machine .1 ─ .2 worker */
  #make(): void {
    const name = this.#name
    mustRun(`ip netns add ${name}`)
    mustRun(`ip link add ${name}h type veth peer name ${name}w netns ${name}`)
    mustRun(`ip addr add ${this.#subnet}.1/24 dev ${name}h`)
    mustRun(`ip link set ${name}h up`)
    this.#configure(name, `${name}w`, `${this.#subnet}.2/24`)
  }

  /** This machine .1 ─ .2 router, 192.168.77.1 ─ 192.168.77.2 worker */
  #makeBehindNat(): void {
    const name = this.#name
    const router = `${name}r`
    this.#make()
    mustRun(`ip netns add ${router}`)
    mustRun(`ip -n ${name} link set ${name}w netns ${router}`)
    this.#configure(router, `${name}w`, `${this.#subnet}.2/24`)
    mustRun(`ip -n ${router} link add inside type veth peer name eth0 netns ${name}`)
    this.#configure(router, 'inside', '192.168.77.1/24')
    this.#configure(name, 'eth0', '192.168.77.2/24')
    mustRun(`ip -n ${name} route add default via 192.168.77.1`)
    const inRouter = `ip netns exec ${router}`
    mustRun(`${inRouter} sysctl -qw net.ipv4.ip_forward=1`)
    mustRun(`${inRouter} nft add table ip nat`)
    mustRun(`${inRouter} nft add chain ip nat out { type nat hook postrouting priority 100 ; }`)
    mustRun(`${inRouter} nft add rule ip nat out oifname ${name}w masquerade`)
  }

  #configure(namespace: string, device: string, address: string): void {
    mustRun(`ip -n ${namespace} addr add ${address} dev ${device}`)
    mustRun(`ip -n ${namespace} link set ${device} up`)
    mustRun(`ip -n ${namespace} link set lo up`)
  }
}
