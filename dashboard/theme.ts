/** Light, dark, or what the system says; the choice is remembered where the browser allows it. */
export type Theme = 'system' | 'light' | 'dark'

const key = 'tunemesh-theme'
const order: Theme[] = ['system', 'light', 'dark']

export function rememberedTheme(): Theme {
  try {
    const stored = localStorage.getItem(key)
    return order.find((theme) => theme === stored) ?? 'system'
  } catch {
    return 'system' // storage is forbidden: the system decides
  }
}

export function applyTheme(theme: Theme): void {
  if (theme === 'system') delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme
  try {
    localStorage.setItem(key, theme)
  } catch {
    // Not remembered, which is all that storage was for.
  }
}

export const nextTheme = (theme: Theme): Theme =>
  order[(order.indexOf(theme) + 1) % order.length] ?? 'system'
