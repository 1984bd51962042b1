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

// Zeros in the slots for kept states (see first_slot) that no sequence needs.
STATEWISE_EXPORT int clear_unused_slots(
    int64_t /*dtype*/, const Span* spans, int64_t n, int64_t every, char* slots, int64_t count, int64_t bytes,
    int64_t /*threads*/) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t used = first_slot(spans, i, every) + (spans[i].count + every - 1) / every;
        const int64_t next = i + 1 < n ? first_slot(spans, i + 1, every) : count;
        if (next > used) std::memset(slots + used * bytes, 0, size_t((next - used) * bytes));
    }
    return 0;
}
