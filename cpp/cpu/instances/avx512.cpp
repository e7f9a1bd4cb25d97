#define VECTOR_BYTES 64
#define CHANNELS_TASK channels_task_avx512
#define BACKWARD_TASK backward_task_avx512
#include "cpu_channels.inl"
#include "cpu_fused_backward.inl"
