// lora_embedding from ATen ops alone: the specification of the mathematics, the differentiable form
// for functorch, forward-mode AD and double backward, and the path of devices without kernels.
#pragma once

#include "dispatch.h"

namespace rankwise {

// y and hidden as `_lora_embedding_forward`; every step differentiable.
EmbeddingForward lora_embedding_forward_composite;

// The gradients, themselves differentiable: `hidden` is computed anew from indices and lora_A.
EmbeddingBackward lora_embedding_backward_composite;

}  // namespace rankwise
