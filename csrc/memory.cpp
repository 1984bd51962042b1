// New memory costs a page fault every 4 KiB when it is first written, which at the speed of these kernels is as much
// again as writing it. Linux hands out 2 MiB at a time where it is asked to.

#include "rows.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// Advice only: nothing happens where it cannot be followed.
STATEWISE_EXPORT int advise_large_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(2) << 20;
    const uintptr_t from = (uintptr_t(start) + page - 1) / page * page, to = (uintptr_t(start) + uintptr_t(bytes)) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
    return 0;
}
