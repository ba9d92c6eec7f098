// What libgomp does around a parallel region, told to ThreadSanitizer, which libgomp is not built with: its threads begin
// with what was before the region, and what is after it begins with all that they did. Without this every region would
// seem to race with the one before. What happens within a region is still looked at, as it is not touched here.
//
// Loaded before libgomp, in whose place it is called.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

void __tsan_acquire(void* at);
void __tsan_release(void* at);

typedef void (*Run)(void*);
typedef void (*Parallel)(Run, void*, unsigned, unsigned);

struct Region {
  Run run;
  void* data;
  char begun, ended;  // addresses that the order of events hangs on
};

static void in_order(void* at) {
  struct Region* region = at;
  __tsan_acquire(&region->begun);
  region->run(region->data);
  __tsan_release(&region->ended);
}

void GOMP_parallel(Run run, void* data, unsigned threads, unsigned flags) {
  static Parallel parallel = NULL;
  if (!parallel) parallel = (Parallel)dlsym(RTLD_NEXT, "GOMP_parallel");
  struct Region region = {run, data, 0, 0};
  __tsan_release(&region.begun);
  parallel(in_order, &region, threads, flags);
  __tsan_acquire(&region.ended);
}
