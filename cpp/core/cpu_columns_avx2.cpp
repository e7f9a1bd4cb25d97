#define VECTOR_BYTES 32
#define COLUMNS_TASK columns_task_avx2
#include "cpu_columns.inl"
