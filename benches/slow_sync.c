/* Makes fsync and fdatasync take SLOW_SYNC_US microseconds longer, as on a slower disk. Loaded by LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int slowly(const char *name, int fd) {
    int (*sync_file)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *delay_us = getenv("SLOW_SYNC_US");
    if (delay_us != NULL) {
        usleep((useconds_t)atol(delay_us));
    }
    return sync_file(fd);
}

int fsync(int fd) {
    return slowly("fsync", fd);
}

int fdatasync(int fd) {
    return slowly("fdatasync", fd);
}
