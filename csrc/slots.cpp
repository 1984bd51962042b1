#include "rows.h"

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
