/**
 * Reads reference tensors (float32, int64) of a safetensors file; only for files that the tests
 * bring along.
 */
import { readFileSync } from 'node:fs'

export interface Tensor {
  shape: number[]
  values: Float32Array | BigInt64Array
}

export function readTensors(path: string): Map<string, Tensor> {
  const bytes = readFileSync(path)
  const headerBytes = Number(bytes.readBigUInt64LE(0))
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerBytes)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >
  const tensors = new Map<string, Tensor>()
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') continue
    const [start, end] = entry.data_offsets.map((offset) => 8 + headerBytes + offset) as [
      number,
      number,
    ]
    const data = Uint8Array.prototype.slice.call(bytes, start, end).buffer
    const values = entry.dtype === 'I64' ? new BigInt64Array(data) : new Float32Array(data)
    tensors.set(name, { shape: entry.shape, values })
  }
  return tensors
}

export function floats(tensors: Map<string, Tensor>, name: string): Float32Array {
  const values = tensors.get(name)?.values
  if (!(values instanceof Float32Array)) throw new Error(`no float32 tensor ${name}`)
  return values
}

export function integers(tensors: Map<string, Tensor>, name: string): { rows: number[][] } {
  const tensor = tensors.get(name)
  if (!(tensor?.values instanceof BigInt64Array)) throw new Error(`no int64 tensor ${name}`)
  const [rows = 0, columns = 0] = tensor.shape
  const values = tensor.values
  return {
    rows: Array.from({ length: rows }, (_, row) =>
      Array.from(values.subarray(row * columns, (row + 1) * columns), Number),
    ),
  }
}
