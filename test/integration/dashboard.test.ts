import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import type { Browser, Page } from 'playwright-core'
import { findChromium, launchChromium, openPage } from './chromium.js'
import { MockPageServer } from './mock-page-server.js'
import { mockPrelude, mockStep, mockWorkers } from './mock-run.js'

const chromium = findChromium()
const pageDir = builtPage()
const skip = chromium === null ? 'no Chromium found' : pageDir === null && 'the page is not built'

const jobId = 'j-1'
const numSteps = 60

describe('dashboard in Chromium', { skip }, () => {
  let browser: Browser
  let server: MockPageServer
  let url: string

  before(async () => {
    browser = await launchChromium(chromium ?? '')
  })
  after(() => browser.close())
  beforeEach(async () => {
    server = new MockPageServer(pageDir ?? '')
    server.jobs = [{ jobId, name: 'drug-names', state: 'RUNNING', createdAtMs: 1 }]
    server.workers = mockWorkers
    url = await server.start()
    for (const event of mockPrelude(numSteps)) server.push(jobId, event)
    pushSteps(1, 10)
  })
  afterEach(() => server.stop())

  const pushSteps = (from: number, to: number) => {
    for (let i = from; i <= to; i++) server.push(jobId, mockStep(i, numSteps))
  }

  test('page: attaches late, then follows live, without a console error', async () => {
    const { page, complaints } = await openPage(browser, url)
    await untilPoints(page, 10)
    pushSteps(11, 14)
    await untilPoints(page, 14)
    assert.equal(await tile(page, 'step'), '14 of 60')
    assert.equal(await page.getByTestId('state').textContent(), 'running')
    assert.equal(await page.getByTestId('freshness').textContent(), 'live')
    assert.deepEqual(complaints, [])
    await page.close()
  })

  test('page: a reload in the middle of a run shows the whole run again', async () => {
    const { page, complaints } = await openPage(browser, url)
    await untilPoints(page, 10)
    pushSteps(11, 20)
    await page.reload()
    await untilPoints(page, 20)
    assert.equal(await page.getByTestId('events').locator('li').count(), 7)
    assert.deepEqual(complaints, [])
    await page.close()
  })

  test('page: a server that restarts is found again; nothing is lost or shown twice', async () => {
    const { page, complaints } = await openPage(browser, url, /WebSocket connection to/)
    await untilPoints(page, 10)
    await server.stop()
    await page.getByText(/^disconnected \d+ s$/).waitFor()
    await server.start(Number(new URL(url).port))
    pushSteps(11, 13)
    server.push(jobId, { log: { level: 'info', message: 'back' } })
    await untilPoints(page, 13)
    await page.getByTestId('events').getByText('back').waitFor()
    assert.equal(server.subscriptions.at(-1)?.afterSequence, 7 + 10)
    const sequences = await page
      .getByTestId('events')
      .locator('li')
      .evaluateAll((items) => items.map((item) => Number(item.getAttribute('data-sequence'))))
    assert.equal(new Set(sequences).size, sequences.length)
    assert.deepEqual(complaints, [])
    await page.close()
  })

  test('page: a silent connection is called stale, not live', async () => {
    const { page, complaints } = await openPage(browser, url)
    await untilPoints(page, 10)
    server.setBeat(false)
    await page.getByText(/^stale \d+ s$/).waitFor()
    server.setBeat(true)
    await page.getByTestId('freshness').getByText('live').waitFor()
    assert.deepEqual(complaints, [])
    await page.close()
  })

  test('page: hostile text stays text', async () => {
    const { page, complaints } = await openPage(browser, url)
    const hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    server.push(jobId, { log: { level: 'error', message: hostile, workerId: hostile } })
    await page.getByText(`${hostile}: ${hostile}`).waitFor()
    assert.equal(await page.title(), 'tunemesh')
    assert.deepEqual(complaints, [])
    await page.close()
  })

  test('page: a failure is an alert with code and words', async () => {
    const { page } = await openPage(browser, url)
    const error = { code: 'NON_FINITE_GRADIENT', message: 'step 11, micro-batch 3, layer 2' }
    server.push(jobId, { stateChanged: { state: 'FAILED', error } })
    const alert = page.getByRole('alert')
    await alert.waitFor()
    assert.match((await alert.textContent()) ?? '', /NON_FINITE_GRADIENT step 11, micro-batch 3/)
    await page.close()
  })

  test('chart: the keyboard reads points; smoothing, log scale keep the page alive', async () => {
    const { page, complaints } = await openPage(browser, url)
    await untilPoints(page, 10)
    await page.getByTestId('chart-loss').focus()
    await page.keyboard.press('Home')
    await page.getByTestId('readout').getByText('step 1', { exact: true }).waitFor()
    await page.keyboard.press('ArrowRight')
    await page.getByTestId('readout').getByText('step 2', { exact: true }).waitFor()
    await page.getByLabel('Log scale').check()
    await page.getByLabel('Smoothing').fill('0.9')
    await page.getByLabel('By tokens').check()
    pushSteps(11, 12)
    await untilPoints(page, 12)
    assert.deepEqual(complaints, [])
    await page.close()
  })

  test('page: 360 pixels are wide enough, in the dark too', async () => {
    const context = await browser.newContext({
      viewport: { width: 360, height: 740 },
      colorScheme: 'dark',
    })
    const { page, complaints } = await openPage(context, url)
    await untilPoints(page, 10)
    const [content, ground] = await page.evaluate<[number, string]>(
      '[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]',
    )
    assert.equal(content, 360)
    assert.equal(ground, 'rgb(16, 18, 21)')
    await page.emulateMedia({ colorScheme: 'light' })
    await page.locator('html[data-theme=light]').waitFor()
    await page.emulateMedia({ colorScheme: 'dark' })
    await page.locator('html[data-theme=dark]').waitFor()
    assert.deepEqual(complaints, [])
    await context.close()
  })

  test('page: a window made narrow while it is open is wide enough too', async () => {
    const context = await browser.newContext({ viewport: { width: 1280, height: 740 } })
    const { page } = await openPage(context, url)
    await untilPoints(page, 10)
    await page.setViewportSize({ width: 360, height: 740 })
    // The charts follow in one of the next frames.
    const content = await page.evaluate<number>(
      `new Promise((resolve) => {
        const look = (frame) => {
          const { scrollWidth } = document.documentElement
          if (scrollWidth === 360 || frame === 300) resolve(scrollWidth)
          else requestAnimationFrame(() => look(frame + 1))
        }
        look(0)
      })`,
    )
    assert.equal(content, 360)
    await context.close()
  })
})

const untilPoints = (page: Page, count: number) =>
  page.locator(`[data-testid=chart-loss][data-points="${count}"]`).waitFor()

const tile = async (page: Page, name: string) =>
  (await page.getByTestId(`tile-${name}`).locator('.value').textContent())?.trim()

/** build/page, from the sources as from build/test/integration. */
function builtPage(): string | null {
  let dir = dirname(fileURLToPath(import.meta.url))
  while (!existsSync(join(dir, 'package.json')) && dirname(dir) !== dir) dir = dirname(dir)
  const page = join(dir, 'build', 'page')
  return existsSync(join(page, 'index.html')) ? page : null
}
