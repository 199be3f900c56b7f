/** Light, dark, or what the system says; the choice is remembered where the browser allows it. */
export type Theme = 'system' | 'light' | 'dark'

const key = 'tunemesh-theme'
const order: Theme[] = ['system', 'light', 'dark']
const systemIsDark = matchMedia('(prefers-color-scheme: dark)')
let chosen: Theme = 'system'

// The system may change, at dusk for instance, while the page is open.
systemIsDark.addEventListener('change', showTheme)

export function rememberedTheme(): Theme {
  try {
    const stored = localStorage.getItem(key)
    return order.find((theme) => theme === stored) ?? 'system'
  } catch {
    return 'system' // storage is forbidden: the system decides
  }
}

export function applyTheme(theme: Theme): void {
  chosen = theme
  showTheme()
  try {
    localStorage.setItem(key, theme)
  } catch {
    // Not remembered, which is all that storage was for.
  }
}

function showTheme(): void {
  const system = systemIsDark.matches ? 'dark' : 'light'
  document.documentElement.dataset.theme = chosen === 'system' ? system : chosen
}

export const nextTheme = (theme: Theme): Theme =>
  order[(order.indexOf(theme) + 1) % order.length] ?? 'system'
