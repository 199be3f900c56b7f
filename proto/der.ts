/**
 * DER (ITU-T X.690), as much of it as certificates and certificate requests need: writes any value,
 * reads one level at a time, and trusts no length.
 */

export const tags = {
  boolean: 0x01,
  integer: 0x02,
  bitString: 0x03,
  octetString: 0x04,
  oid: 0x06,
  utf8String: 0x0c,
  utcTime: 0x17,
  generalizedTime: 0x18,
  sequence: 0x30,
  set: 0x31,
} as const

/** `[n]` of a SEQUENCE's member, with a whole value in it. */
export const explicit = (n: number): number => 0xa0 | n
/** `[n]` that takes the place of a primitive value's own tag. */
export const implicit = (n: number): number => 0x80 | n

export function der(tag: number, ...parts: Uint8Array[]): Buffer {
  const content = Buffer.concat(parts)
  const { length } = content
  if (length < 0x80) return Buffer.concat([Buffer.from([tag, length]), content])
  const bytes = Buffer.from(evenHex(length.toString(16)), 'hex')
  return Buffer.concat([Buffer.from([tag, 0x80 | bytes.length]), bytes, content])
}

export const sequence = (...parts: Uint8Array[]): Buffer => der(tags.sequence, ...parts)

/** An unsigned integer, most significant byte first. */
export function integer(bytes: Uint8Array): Buffer {
  let start = 0
  while (start < bytes.length - 1 && bytes[start] === 0) start++
  const rest = bytes.subarray(start)
  const isHigh = ((rest[0] ?? 0) & 0x80) !== 0
  return der(tags.integer, Buffer.from(isHigh ? [0] : []), rest)
}

export function oid(dotted: string): Buffer {
  const [first = 0, second = 0, ...others] = dotted.split('.').map(Number)
  return der(tags.oid, Buffer.from([first * 40 + second, ...others.flatMap(base128)]))
}

/** @param unusedBits of the last byte */
export const bitString = (bytes: Uint8Array, unusedBits = 0): Buffer =>
  der(tags.bitString, Buffer.from([unusedBits]), bytes)

export interface DerValue {
  tag: number
  content: Buffer
  /** Tag and length included. */
  whole: Buffer
}

/** The values that stand one after another in `bytes`. @throws RangeError where they do not fit */
export function readDer(bytes: Buffer): DerValue[] {
  const values: DerValue[] = []
  for (let at = 0; at < bytes.length; ) {
    const value = readOne(bytes.subarray(at))
    values.push(value)
    at += value.whole.length
  }
  return values
}

function readOne(bytes: Buffer): DerValue {
  const [tag, short] = bytes
  if (tag === undefined || short === undefined) throw new RangeError('DER ends within a header')
  const numLengthBytes = short < 0x80 ? 0 : short & 0x7f
  if (numLengthBytes > 3 || short === 0x80) throw new RangeError('a DER length is not supported')
  const start = 2 + numLengthBytes
  if (bytes.length < start) throw new RangeError('DER ends within a length')
  const length = numLengthBytes === 0 ? short : bytes.readUIntBE(2, numLengthBytes)
  if (bytes.length < start + length) throw new RangeError('DER ends within a value')
  const whole = bytes.subarray(0, start + length)
  return { tag, content: whole.subarray(start), whole }
}

function base128(value: number): number[] {
  const digits = [value & 0x7f]
  for (let rest = value >>> 7; rest > 0; rest >>>= 7) digits.unshift((rest & 0x7f) | 0x80)
  return digits
}

const evenHex = (hex: string) => (hex.length % 2 === 0 ? hex : `0${hex}`)
