#define VECTOR_BYTES 16
#define COLUMNS_TASK columns_task_baseline
#include "cpu_columns.inl"
