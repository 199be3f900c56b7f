/**
 * A tokenised dataset as one blob: safetensors with int32 tensors.
 *
 *   tokens, targets   [numTokens]      all packs one after another; targets are already shifted: targets[i] is what
 *                                      position i must predict, -100 where nothing is trained
 *   pack_offsets      [numPacks + 1]   where each pack starts in `tokens`
 *   document_starts   [numDocuments + numPacks]  per pack: its documents' starts, relative to the pack, and its length
 *   document_offsets  [numPacks + 1]   where each pack's entries start in `document_starts`
 *
 * With packing every pack has exactly T tokens (the rest filled: token 0, target -100, a document of its own).
 */
export interface PackShard {
  tokens: Int32Array
  targets: Int32Array
  packOffsets: Int32Array
  documentStarts: Int32Array
  documentOffsets: Int32Array
}
