import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import type { Browser, Page } from 'playwright-core'
import { connect } from '../../client/client.js'
import { type EmbeddedCoordinator, startEmbedded } from '../../client/embedded.js'
import { findChromium, launchChromium, openPage } from './chromium.js'
import {
  engineMissing,
  projectDir,
  type TemporaryFolder,
  temporaryFolder,
} from './temporary-mesh.js'

const chromium = findChromium()
const isBuilt = existsSync(join(projectDir(), 'build', 'page', 'index.html'))
const skip =
  chromium === null ? 'no Chromium found' : isBuilt ? engineMissing() : 'the page is not built'

describe('dashboard of a real coordinator in Chromium', { skip }, () => {
  let browser: Browser
  let folder: TemporaryFolder
  let mesh: EmbeddedCoordinator

  before(async () => {
    browser = await launchChromium(chromium ?? '')
    folder = temporaryFolder({ max_steps: 100_000, save_steps: 20 })
    mesh = await startMesh()
    await submit(folder.jobPath)
  })
  after(async () => {
    await mesh?.close(2_000)
    await browser?.close()
    folder?.remove()
  })

  const startMesh = () =>
    startEmbedded({ stateDir: folder.stateDir, numWorkers: 2, threadsPerWorker: 1 })

  async function submit(path: string): Promise<void> {
    const { grpc, token } = mesh.endpoint
    const client = connect({ address: grpc, token })
    await client.submit({
      jobFile: readFileSync(path, 'utf8'),
      jobFileName: basename(path),
      baseDir: dirname(path),
    })
    client.close()
  }

  test('live update, reload in mid-run, coordinator killed and started again', async () => {
    // The cut connection is the test's own doing; everything else must stay quiet.
    const { page, complaints } = await openPage(browser, mesh.endpoint.dashboard, /WebSocket/)
    await untilStep(page, 5)
    assert.equal(await page.getByTestId('state').textContent(), 'running')
    assert.equal(await page.locator('table.workers tbody tr').count(), 2)

    await page.reload()
    const beforeRestart = await untilStep(page, 10)
    assert.equal(await page.getByTestId('freshness').textContent(), 'live')

    // The whole group at once, as when a machine loses power: the job goes on at the next start.
    process.kill(-mesh.endpoint.pid, 'SIGKILL')
    await mesh.ended
    await page.getByText(/^disconnected \d+ s$/).waitFor()
    mesh = await startMesh()
    await page.getByTestId('freshness').getByText('live').waitFor()
    await untilStep(page, beforeRestart + 25)
    const sequences = await page
      .getByTestId('events')
      .locator('li')
      .evaluateAll((items) => items.map((item) => Number(item.getAttribute('data-sequence'))))
    assert.equal(new Set(sequences).size, sequences.length)
    assert.deepEqual(complaints, [])
    await page.close()
  })
})

/** Waits until the chart has a point for each step up to at least this one. */
async function untilStep(page: Page, step: number): Promise<number> {
  await page.waitForFunction((least) => {
    // In the page there is a DOM; here there are no types for it.
    const { document } = globalThis as unknown as {
      document: { querySelector(name: string): { dataset: { points?: string } } | null }
    }
    return Number(document.querySelector('[data-testid=chart-loss]')?.dataset.points) >= least
  }, step)
  return Number(await page.getByTestId('chart-loss').getAttribute('data-points'))
}
