// What the steps of all optimizers, norms and scaling count and are told by, under the names that the tests know.
#include "step.h"

namespace nnfast {

Path step_threads("step.threads"), reordered_gradient("step.reordered_gradient"), in_order("step.in_order");
Threshold step_grain("step.grain", 16384), step_chunk("step.chunk", 65536);

}  // namespace nnfast
