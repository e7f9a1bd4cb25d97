#define VECTOR_BYTES 64
#define COLUMNS_TASK columns_task_avx512
#include "cpu_columns.inl"
