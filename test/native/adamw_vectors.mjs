// Writes adamw_vectors.json, adamw_half_vectors.json and adamw_byte_vectors.json beside this file:
// the update of backend.h without our native code.
// JavaScript's float64 has more than 2 * 24 + 2 bits, so rounding each float64 result of + - * /
// sqrt to float32 gives exactly the IEEE float32 result. Every number is the float32's bits as an
// unsigned integer; of the float64 scalars beta1 and beta2 the high word, then the low word. In the
// second file states and gradients are bfloat16 bits, rounded stochastically when they are stored
// (kernels/stochastic_rounding.h); its scalars go on with the seed's high and low word, the step
// and the canonical block where the elements start. In the third the moments are 8-bit codes
// (kernels/byte_moments.h); a case has the exponents of its blocks, m's, v's, m's after, v's after.
// Run: node adamw_vectors.mjs
import { writeFileSync } from 'node:fs'

const f = Math.fround
const view = new DataView(new ArrayBuffer(8))
const bits = (x) => {
  view.setFloat32(0, x)
  return view.getUint32(0)
}
const doubleBits = (x) => {
  view.setFloat64(0, x)
  return [view.getUint32(0), view.getUint32(4)]
}

function update(s, [p0, m0, v0, gradient]) {
  const decay = f(s.learningRate * s.weightDecay)
  const oneMinusBeta1 = f(1 - s.beta1)
  const oneMinusBeta2 = f(1 - s.beta2)
  const stepSize = f(s.learningRate / s.biasCorrection1)
  const g = f(gradient * s.clipFactor)
  const p = s.weightDecay === 0 ? p0 : f(p0 - f(p0 * decay))
  const m = f(m0 + f(f(g - m0) * oneMinusBeta1))
  const v = f(f(v0 * f(s.beta2)) + f(f(g * g) * oneMinusBeta2))
  const denominator = f(f(f(Math.sqrt(v)) / s.biasCorrection2Sqrt) + s.epsilon)
  return [f(p - f(stepSize * f(m / denominator))), m, v]
}

// Mulberry32: a fixed stream, so that the file never changes by itself.
let state = 20261124
function uniform() {
  state = (state + 0x6d2b79f5) | 0
  let t = Math.imul(state ^ (state >>> 15), 1 | state)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296
}
const signedPower = (low, high) =>
  f((uniform() < 0.5 ? -1 : 1) * 10 ** (low + (high - low) * uniform()))
const element = () => [
  signedPower(-4, 1),
  signedPower(-9, -1),
  Math.abs(signedPower(-14, -2)),
  signedPower(-9, 2),
]

const scalars = (changes) => {
  const s = {
    learningRate: 3e-4,
    clipFactor: 1,
    biasCorrection1: 0.1,
    biasCorrection2Sqrt: 0.0316,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weightDecay: 0,
    ...changes,
  }
  const isDouble = (key) => key.startsWith('beta')
  return Object.fromEntries(
    Object.entries(s).map(([key, value]) => [key, isDouble(key) ? value : f(value)]),
  )
}
const edge = [
  [0, 0, 0, 0],
  [-0, 0, 0, -0],
  [1, 0, 0, 1],
  [1, 0, 0, 1e-20],
  [1, 0, 0, 1e-23],
  [1, 1e-40, 1e-44, 1e-41],
  [1e-38, 1e-3, 1e-6, 1e-3],
  [3e38, 1, 1, 1],
  [1, 1, 1, 1.8e19],
  [1, -1, 1, -1.8e19],
  [0.1, 0.2, 0.3, 0.2],
].map((row) => row.map(f))
const step = (t) => ({
  biasCorrection1: 1 - 0.9 ** t,
  biasCorrection2Sqrt: Math.sqrt(1 - 0.999 ** t),
})
const cases = [
  { name: 'first step', scalars: scalars(step(1)) },
  {
    name: 'step 1000, clipped',
    scalars: scalars({ ...step(1000), clipFactor: 0.37, learningRate: 1e-5 }),
  },
  { name: 'weight decay', scalars: scalars({ ...step(7), weightDecay: 0.01 }) },
  {
    name: 'beta2 0.95, strong decay',
    scalars: scalars({ ...step(3), beta2: 0.95, weightDecay: 0.3, epsilon: 1e-6 }),
  },
  {
    name: 'learning rate zero',
    scalars: scalars({ ...step(2), learningRate: 0, weightDecay: 0.1 }),
  },
]

const scalarBits = (s) =>
  Object.entries(s).flatMap(([key, value]) =>
    key.startsWith('beta') ? doubleBits(value) : [bits(value)],
  )
write(
  'adamw_vectors.json',
  Object.keys(scalars({})),
  cases.map((c) => ({
    name: c.name,
    scalars: scalarBits(c.scalars),
    elements: [...edge, ...Array.from({ length: 38 }, element)].map((row) =>
      [...row, ...update(c.scalars, row)].map(bits),
    ),
  })),
)

/** Philox4x32-10 (Salmon et al. 2011). */
function philox(counter, key) {
  const mask = 0xffffffffn
  let [c0, c1, c2, c3] = counter
  let [k0, k1] = key
  for (let round = 0; round < 10; round++) {
    const product0 = 0xd2511f53n * c0
    const product1 = 0xcd9e8d57n * c2
    c0 = (product1 >> 32n) ^ c1 ^ k0
    c1 = product1 & mask
    c2 = (product0 >> 32n) ^ c3 ^ k1
    c3 = product0 & mask
    k0 = (k0 + 0x9e3779b9n) & mask
    k1 = (k1 + 0xbb67ae85n) & mask
  }
  return [c0, c1, c2, c3]
}

/**
 * The 16 bits that are added before it is cut to element `number` of the canonical vector: of its
 * weight, first and second moment (`what` 0, 1, 2).
 */
function noise({ seed, step: jobStep }, what, number) {
  const group = number / 8n
  const counter = [group & 0xffffffffn, group >> 32n, 7n, BigInt(jobStep)]
  const words = philox(counter, [seed & 0xffffffffn, seed >> 32n])
  const halfWord = (Number(number % 8n) + 2 * what) % 8
  return Number((words[halfWord >> 1] >> BigInt(16 * (halfWord % 2))) & 0xffffn)
}

function rounded(x, draw) {
  const pattern = bits(x)
  if (Number.isNaN(x)) return (pattern >>> 16) | 0x40
  if (!Number.isFinite(x)) return pattern >>> 16
  return Math.floor((pattern + draw) / 65536)
}
const fromHalf = (half) => {
  view.setUint32(0, half * 65536)
  return view.getFloat32(0)
}

function updateHalf(c, row, index) {
  const number = BigInt(c.firstBlock) * 256n + BigInt(index)
  const after = update(c.scalars, row.map(fromHalf))
  return after.map((x, k) => rounded(x, noise(c, k, number)))
}

const halfCases = [
  { name: 'first step', scalars: scalars(step(1)), seed: 5n, step: 1, firstBlock: 0 },
  {
    name: 'step 1000, a long seed, a far block, decay',
    scalars: scalars({ ...step(1000), clipFactor: 0.37, learningRate: 1e-5, weightDecay: 0.01 }),
    seed: 0x123456789abcdef0n,
    step: 1000,
    firstBlock: 70001,
  },
  {
    name: 'learning rate zero',
    scalars: scalars({ ...step(2), learningRate: 0 }),
    seed: 0xffffffffn,
    step: 0xffffffff,
    firstBlock: 3,
  },
]
const halfScalars = (c) => [
  ...scalarBits(c.scalars),
  Number(c.seed >> 32n),
  Number(c.seed & 0xffffffffn),
  c.step,
  c.firstBlock,
]
write(
  'adamw_half_vectors.json',
  [...Object.keys(scalars({})), 'seed', 'step', 'firstBlock'],
  halfCases.map((c) => ({
    name: c.name,
    scalars: halfScalars(c),
    elements: [...edge, ...Array.from({ length: 290 }, element)].map((values, index) => {
      const row = values.map((x) => bits(x) >>> 16)
      return [...row, ...updateHalf(c, row, index)]
    }),
  })),
)

// --- moments of bytes: real arithmetic on exact numbers ---

const tops = { m: 15, v: 31 }
const leastOf = (exponent, top) => exponent - top + 1

function momentOf(code, exponent, top) {
  const step = 2 ** (leastOf(exponent, top) + Math.max(code >> 3, 1) - 1 - 127 - 3)
  return step * (code >> 3 === 0 ? code : 8 + (code & 7))
}

/** The exponent that the largest of them has once its noise is added. */
function exponentOf(values, draws) {
  const exponents = values.map((x, i) => (bits(Math.abs(x)) + 16 * draws[i]) >>> 23)
  return Math.max(34, ...exponents)
}

function codeOf(x, draw, exponent, top) {
  const least = leastOf(exponent, top)
  const own = Math.max(bits(x) >>> 23, least)
  const steps = x / 2 ** (own - 127 - 3)
  const isSmall = bits(x) >>> 23 < least
  const start = isSmall ? f(steps + 8) : steps
  const whole = Math.floor((start * 2 ** 20 + 16 * draw) / 2 ** 20)
  return 8 * (own - least) + whole - (isSmall ? 8 : 0)
}

const blocksOf = (all) =>
  Array.from({ length: Math.ceil(all.length / 256) }, (_, b) => all.slice(256 * b, 256 * b + 256))

function updateBytes(c, rows, before) {
  const after = rows.map(([p, m, v, gradient], i) => {
    const block = Math.floor(i / 256)
    const first = momentOf(m & 127, before.m[block], tops.m) * (m > 127 ? -1 : 1)
    return update(c.scalars, [
      fromHalf(p),
      f(first),
      f(momentOf(v, before.v[block], tops.v)),
      fromHalf(gradient),
    ])
  })
  const draws = [0, 1, 2].map((what) =>
    rows.map((_, i) => noise(c, what, BigInt(c.firstBlock) * 256n + BigInt(i))),
  )
  const exponents = (k) =>
    blocksOf(after.map((x, i) => [x[k], draws[k][i]])).map((block) =>
      exponentOf(
        block.map(([x]) => x),
        block.map(([, draw]) => draw),
      ),
    )
  const exponentsAfter = { m: exponents(1), v: exponents(2) }
  const codes = after.map(([p, m, v], i) => {
    const block = Math.floor(i / 256)
    const first = codeOf(Math.abs(m), draws[1][i], exponentsAfter.m[block], tops.m)
    const second = codeOf(v, draws[2][i], exponentsAfter.v[block], tops.v)
    const isNegative = bits(m) >>> 31
    return [rounded(p, draws[0][i]), first + 128 * isNegative, v > 0 ? Math.max(second, 1) : second]
  })
  return { codes, exponentsAfter }
}

const byteCases = halfCases.map((c, index) => {
  const exponents = { m: [112 - 4 * index, 34], v: [95 - 4 * index, 34 + 30 * index] }
  const byte = () => Math.floor(256 * uniform())
  const rows = Array.from({ length: 301 }, (_, i) => {
    const [p, gradient] = [signedPower(-4, 1), signedPower(-8, -4)].map((x) => bits(x) >>> 16)
    if (i % 9 === 0) return [p, 0, 0, i % 2 === 0 ? 0 : gradient]
    return [p, byte(), byte(), i % 5 === 0 ? bits(f(1e-12)) >>> 16 : gradient]
  })
  const { codes, exponentsAfter } = updateBytes(c, rows, exponents)
  return { ...c, rows, exponents, codes, exponentsAfter }
})
write(
  'adamw_byte_vectors.json',
  [...Object.keys(scalars({})), 'seed', 'step', 'firstBlock'],
  byteCases.map((c, index) => ({
    name: c.name,
    scalars: halfScalars(halfCases[index]),
    exponents: [c.exponents.m, c.exponents.v, c.exponentsAfter.m, c.exponentsAfter.v].flat(),
    elements: c.rows.map((row, i) => [...row, ...c.codes[i]]),
  })),
)

function write(file, names, all) {
  const exponents = (c) =>
    c.exponents === undefined ? '' : `"exponents": ${JSON.stringify(c.exponents)},\n      `
  const lines = all.map(
    (c) => `    { "name": ${JSON.stringify(c.name)}, "scalars": ${JSON.stringify(c.scalars)},
      ${exponents(c)}"elements": [
${c.elements.map((row) => `      ${JSON.stringify(row)}`).join(',\n')}
    ] }`,
  )
  writeFileSync(
    new URL(file, import.meta.url),
    `{
  "scalars": ${JSON.stringify(names)},
  "columns": ["p", "m", "v", "gradient", "p after", "m after", "v after"],
  "cases": [
${lines.join(',\n')}
  ]
}
`,
  )
}
