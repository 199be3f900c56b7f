import { render } from 'preact'
import { App } from './app.js'
import { LiveFeed } from './live-feed.js'
import { applyTheme, rememberedTheme } from './theme.js'

applyTheme(rememberedTheme())

const liveUrl = new URL('live', location.href)
liveUrl.protocol = location.protocol === 'https:' ? 'wss:' : 'ws:'
liveUrl.search = ''
liveUrl.hash = ''
const wanted = new URLSearchParams(location.search).get('job')
const feed = new LiveFeed(liveUrl.href, wanted)

const root = document.getElementById('app')
if (root) render(<App feed={feed} />, root)
