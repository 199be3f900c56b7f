/** Ids that must not be swapped by mistake: a branded string each. */
declare const brand: unique symbol
type Branded<T, Name extends string> = T & { readonly [brand]: Name }

export type JobId = Branded<string, 'JobId'>
export type WorkerId = Branded<string, 'WorkerId'>

export const jobId = (text: string): JobId => text as JobId
export const workerId = (text: string): WorkerId => text as WorkerId
