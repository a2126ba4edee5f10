#include <stddef.h>
#include <stdint.h>
#include <string.h>

void batch_copy(size_t count, const uint64_t *sources, const uint64_t *targets, const uint64_t *sizes)
{
    for (size_t i = 0; i < count; i++)
        memcpy((void *)(uintptr_t)targets[i], (const void *)(uintptr_t)sources[i], sizes[i]);
}
