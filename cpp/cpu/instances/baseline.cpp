#define VECTOR_BYTES 16
#define CHANNELS_TASK channels_task_baseline
#define BACKWARD_TASK backward_task_baseline
#include "cpu_channels.inl"
#include "cpu_fused_backward.inl"
