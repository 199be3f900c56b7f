/** Ids that must not be swapped by mistake: a branded string or number each. */
declare const brand: unique symbol
type Branded<T, Name extends string> = T & { readonly [brand]: Name }

export type JobId = Branded<string, 'JobId'>
export type WorkerId = Branded<string, 'WorkerId'>
export type FleetEpoch = Branded<number, 'FleetEpoch'>

export const jobId = (text: string): JobId => text as JobId
export const workerId = (text: string): WorkerId => text as WorkerId
export const fleetEpoch = (value: number): FleetEpoch => value as FleetEpoch
