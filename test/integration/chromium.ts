/** The system's Chromium for tests of the page, and what a page complained about. */
import { accessSync, constants } from 'node:fs'
import { type Browser, type BrowserContext, chromium, type Page } from 'playwright-core'

const places = [
  '/usr/bin/chromium',
  '/usr/bin/chromium-browser',
  '/usr/bin/google-chrome-stable',
  '/usr/bin/google-chrome',
  '/snap/bin/chromium',
]

export function findChromium(): string | null {
  const asked = process.env.TUNEMESH_CHROMIUM
  return (asked ? [asked] : places).find(isExecutable) ?? null
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}

export const launchChromium = (executablePath: string): Promise<Browser> =>
  chromium.launch({
    executablePath,
    args: [
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      '--disable-dev-shm-usage',
    ],
  })

export interface WatchedPage {
  page: Page
  /** Console errors, uncaught exceptions, refused or failed requests, requests to other hosts. */
  complaints: string[]
}

/** @param expected complaints that the test provokes, such as a connection that it cuts */
export async function openPage(
  browser: Browser | BrowserContext,
  url: string,
  expected: RegExp = /(?!)/,
): Promise<WatchedPage> {
  const page = await browser.newPage()
  const complaints: string[] = []
  const complain = (text: string) => {
    if (!expected.test(text)) complaints.push(text)
  }
  page.on('console', (message) => {
    if (message.type() === 'error' || message.type() === 'warning') complain(message.text())
  })
  page.on('pageerror', (error) => complain(`uncaught: ${error.message}`))
  page.on('requestfailed', (request) => complain(`failed: ${request.url()}`))
  page.on('request', (request) => {
    if (new URL(request.url()).host !== new URL(url).host) complain(`foreign: ${request.url()}`)
  })
  await page.goto(url)
  return { page, complaints }
}
