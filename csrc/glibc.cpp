// For wheels alone (NNFAST_WHEEL in setup.py): functions that a newer glibc offers under a newer version too are linked
// under the old one, so that a wheel built on this system runs on older ones. They take and give the same numbers.
#include <pthread.h>

#include <sstream>

#if defined(__GLIBCXX__) && __cplusplus > 201703L
// What the C++ library has since GCC 11 is brought along.
template std::string std::stringbuf::str() const&;
#endif

#if defined(__x86_64__) && defined(__GLIBC__)

extern "C" {

// The linker hands calls of f to __wrap_f (setup.py reads this file for the names).
#define OLD(result, name, parameters, arguments)          \
  result old_##name parameters;                           \
  __asm__(".symver old_" #name "," #name "@GLIBC_2.2.5"); \
  __attribute__((visibility("hidden"))) result __wrap_##name parameters { return old_##name arguments; }

OLD(double, exp, (double x), (x))
OLD(double, exp2, (double x), (x))
OLD(double, log, (double x), (x))
OLD(double, log2, (double x), (x))
OLD(double, pow, (double x, double y), (x, y))
OLD(int, pthread_mutex_trylock, (pthread_mutex_t * mutex), (mutex))
OLD(int, pthread_once, (pthread_once_t * once, void (*f)()), (once, f))

// Whether counting references may do without atomic operations: never.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
