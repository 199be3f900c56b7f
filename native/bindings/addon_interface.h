// Written by: node scripts/addon-interface.mjs
#pragma once

namespace tunemesh {

// Of the names that JavaScript and the addon share; worker/addon-interface.ts has the same.
inline constexpr const char* kAddonInterface = "b63a8335b6ef";

}  // namespace tunemesh
