/**
 * What users read where a card, its driver or its libraries do not serve. Driver and libraries are
 * stand-ins that only tell a version (test/native/fake_cuda.cc); a card short of memory is the host
 * (test/native/host_card.cc).
 */
import assert from 'node:assert/strict'
import { copyFileSync, cpSync, existsSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { cpuWarnings } from '../../coordinator/job-plan.js'
import { cudaPlugin, fakeLibraries, hostCard, lacks, ProgramCopy } from './host-card.js'
import { examplesDir } from './open-coordinator.js'

/** The tiny model's job in a folder of its own. */
function tinyJobIn(copy: ProgramCopy): string {
  const folder = join(copy.folder, 'job')
  if (!existsSync(folder)) cpSync(join(examplesDir, 'tiny-llama'), folder, { recursive: true })
  return join(folder, 'job.yaml')
}

const trainOn = (copy: ProgramCopy, env: NodeJS.ProcessEnv) => {
  const options = ['--device', 'cuda:0', '--no-dashboard', '--set', 'max_steps=6']
  const { stdout, stderr, status } = copy.run(
    join('cli', 'main.js'),
    ['train', tinyJobIn(copy), ...options],
    env,
  )
  return { text: stdout + stderr, status }
}

const skip = lacks(cudaPlugin) || (existsSync(fakeLibraries) ? false : 'no stand-ins here')

describe('a driver or libraries that do not serve', { skip, timeout: 240_000 }, () => {
  let copy: ProgramCopy
  let env: NodeJS.ProcessEnv
  let libraries: string

  before(() => {
    copy = new ProgramCopy(cudaPlugin)
    const driver = join(copy.folder, 'driver')
    libraries = join(copy.folder, 'libraries')
    for (const folder of [driver, libraries]) mkdirSync(folder)
    copyFileSync(join(fakeLibraries, 'libcuda.so.1'), join(driver, 'libcuda.so.1'))
    for (const file of ['libcublasLt.so.13', 'libcudnn.so.9'])
      copyFileSync(join(fakeLibraries, file), join(libraries, file))
    env = { LD_LIBRARY_PATH: driver, TUNEMESH_FAKE_DRIVER: '13000' }
  })
  after(() => copy.remove())

  const doctor = (more: NodeJS.ProcessEnv) =>
    copy.run(join('cli', 'main.js'), ['doctor'], { ...env, ...more }).stdout

  test('a driver that is too old is told with both versions, and what to install', () => {
    const old = { TUNEMESH_FAKE_DRIVER: '12020' }
    const why =
      /the driver is for CUDA 12\.2, this program needs 13\.\d: install NVIDIA's driver 580/
    assert.match(doctor(old), why)
    const { text, status } = trainOn(copy, { ...env, ...old })
    assert.match(text, why)
    assert.match(text, /ENGINE_MISSING No worker of this machine can start: Device cuda:0 /)
    assert.notEqual(status, 0)
  })

  test('a worker that was to find a GPU says why it computes on the CPU', () => {
    const ask = (wanted: string, driverFile: string) => {
      const script =
        `import('${join(copy.folder, 'build', 'worker', 'device.js')}').then(({ unusedGpu }) =>` +
        `process.stdout.write(unusedGpu('${wanted}', 'cpu', '${driverFile}')))`
      const more = { ...env, TUNEMESH_FAKE_DRIVER: '12020' }
      return copy.node(['-e', script], more).stdout
    }
    const driverFile = join(copy.folder, 'package.json')
    assert.match(ask('auto', driverFile), /^the driver is for CUDA 12\.2, this program needs 13/)
    assert.equal(ask('auto', '/nowhere'), '')
    assert.equal(ask('cpu', driverFile), '')
    const hello = { device: 'cpu: 2 threads', libraries: ['gpu: the driver is old'] }
    const told = 'Worker w-1 computes on the CPU although its machine has a GPU: the driver is old.'
    assert.deepEqual(cpuWarnings({ id: 'w-1', hello }), [told])
    assert.deepEqual(
      cpuWarnings({ id: 'w-1', hello: { device: 'cuda: H100', libraries: ['x'] } }),
      [],
    )
  })

  test('a machine without a driver is told so, and computes on the CPU', () => {
    const text = doctor({ TUNEMESH_FAKE_DRIVER: '0' })
    assert.match(text, /no NVIDIA driver is loaded; for GPUs, install NVIDIA's driver 580 or newer/)
    assert.match(text, /Workers compute on the CPU/)
    assert.doesNotMatch(text, /cuBLASLt not found/)
  })

  test('missing libraries are told with every place tried and how to get them', (context) => {
    const text = doctor({
      TUNEMESH_CUDA_LIBRARY_PATH: '/nowhere/one:/nowhere/two',
      CUDA_HOME: '/nowhere/toolkit',
      VIRTUAL_ENV: '/nowhere/venv',
    })
    if (/cuBLASLt +\d/.test(text)) return context.skip('this machine has cuBLASLt')
    for (const name of [/cuBLASLt not found.*/, /cuDNN not found.*/]) {
      const [line = ''] = name.exec(text) ?? []
      for (const place of [
        '/nowhere/one (no such folder)',
        '/nowhere/two (no such folder)',
        'loader: lib',
        '/nowhere/toolkit/lib64',
        '/nowhere/venv/lib/python3*/site-packages/nvidia',
        'tunemesh doctor --install-libs DIR',
        'TUNEMESH_CUDA_LIBRARY_PATH',
      ])
        assert.ok(line.includes(place), `${place} is not in: ${line}`)
    }
  })

  test('libraries too old, not for one CUDA or not for the driver are told so', () => {
    const withLibraries = (cublaslt: string, cudnn: string, cuda: string) =>
      doctor({
        TUNEMESH_CUDA_LIBRARY_PATH: libraries,
        TUNEMESH_FAKE_CUBLASLT: cublaslt,
        TUNEMESH_FAKE_CUDNN: cudnn,
        TUNEMESH_FAKE_CUDNN_CUDA: cuda,
      })
    const old = withLibraries('120700', '91000', '12090')
    assert.match(
      old,
      /12\.7\.0 at \S+libcublasLt\.so\.13; 12\.8 or newer is needed: .*--install-libs/,
    )
    assert.match(old, /9\.10\.0 for CUDA 12\.9 at \S+; 9\.12 or newer is needed: .*--install-libs/)
    assert.match(
      withLibraries('130002', '91900', '12090'),
      /9\.19\.0 for CUDA 12\.9 at \S+ does not go with cuBLASLt 13\.0\.2 at .*--install-libs/,
    )
    assert.match(
      withLibraries('140000', '91900', '14000'),
      /14\.0\.0 at \S+ needs a driver for CUDA 14, this one is for 13\.0: install NVIDIA's driver/,
    )
    assert.match(withLibraries('130002', '91900', '13000'), /✓ cuDNN +9\.19\.0 for CUDA 13\.0/)
  })
})

describe('a card that is short of memory', { skip: lacks(hostCard), timeout: 240_000 }, () => {
  let copy: ProgramCopy
  before(() => {
    copy = new ProgramCopy(hostCard)
  })
  after(() => copy.remove())

  test('of less than the job takes: both sizes, what to lower, before anything is taken', () => {
    const { text, status } = trainOn(copy, { TUNEMESH_HOST_CARD_BYTES: '300000' })
    assert.match(text, /DEVICE_MEMORY_SHORT Worker \S+ needs \d+\.\d MiB and has 0\.3 MiB\. Lower /)
    assert.notEqual(status, 0)
  })

  test('that others have: what is free, what was planned, and what to do', () => {
    const { text, status } = trainOn(copy, { TUNEMESH_HOST_CARD_FREE_BYTES: '300000' })
    const told = new RegExp(
      'DEVICE_MEMORY_SHORT .*no device memory for \\d+\\.\\d KiB: 293\\.0 KiB of 64\\.0 GiB are ' +
        'free .*Planned: .*Lower per_device_train_batch_size or max_length.*end what else takes',
    )
    assert.match(text, told)
    assert.notEqual(status, 0)
  })
})
