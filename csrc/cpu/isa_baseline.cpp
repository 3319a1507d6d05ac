// The CPU kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on ARM.
#define FC_ISA baseline
#define FC_VECTOR_BYTES 16
#define FC_VECTORS_PER_PANEL 2
#include "isa.h"

namespace fastclip {
Isa isa_baseline() { return {"baseline", baseline::kernels<float>(), baseline::kernels<double>(), {}}; }
}  // namespace fastclip
