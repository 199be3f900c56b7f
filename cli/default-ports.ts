/** The ports of `tunemesh up`; an embedded mesh takes free ones. */
export const defaultPorts = { grpc: 8471, dashboard: 8470 } as const
