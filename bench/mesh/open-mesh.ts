/** An embedded mesh for measuring and comparing: no dashboard, nats-server as the launcher says. */
import { connect, type TunemeshClient } from '../../client/client.js'
import { startEmbedded } from '../../client/embedded.js'

export interface MeshOptions {
  stateDir: string
  numWorkers: number
  threadsPerWorker: number
  /** "cpu", "cuda:0" and so on. */
  device: string
}

export interface OpenMesh {
  client: TunemeshClient
  stateDir: string
  close(): Promise<void>
}

export async function openMesh(options: MeshOptions): Promise<OpenMesh> {
  const mesh = await startEmbedded({
    ...options,
    dashboardPort: null,
    natsServerPath: process.env.TUNEMESH_NATS_SERVER || undefined,
  })
  const client = connect({ address: mesh.endpoint.grpc, token: mesh.endpoint.token })
  const close = async () => {
    client.close()
    await mesh.close()
  }
  return { client, stateDir: options.stateDir, close }
}
