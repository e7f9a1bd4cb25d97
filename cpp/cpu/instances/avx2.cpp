#define VECTOR_BYTES 32
#define CHANNELS_TASK channels_task_avx2
#define BACKWARD_TASK backward_task_avx2
#include "cpu_channels.inl"
#include "cpu_fused_backward.inl"
