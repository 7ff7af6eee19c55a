/* Hides processor features from a program that asks CPUID, to measure it as on a lesser processor.

     cc -O2 -shared -fPIC -o cpuid_mask.so cpuid_mask.c
     HIDE=amx|avx512|vnni LD_PRELOAD=./cpuid_mask.so COMMAND

   amx: no AMX. avx512: no AMX and no AVX-512 either (AVX-VNNI stays). vnni: AVX2 alone.
   Linux on x86-64 with the flag cpuid_fault: CPUID traps, and the handler answers without the hidden bits. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID 0x1012
static int level; /* 1: amx, 2: avx512, 3: vnni */

static void set_faulting(int on) { syscall(SYS_arch_prctl, ARCH_CPUID, on ? 0UL : 1UL); }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)reg[REG_RIP];
    unsigned leaf = reg[REG_RAX], sub = reg[REG_RCX], a, b, c, d;
    (void)number; (void)info;
    if (at[0] != 0x0f || at[1] != 0xa2) { signal(SIGSEGV, SIG_DFL); return; }
    set_faulting(0);
    __cpuid_count(leaf, sub, a, b, c, d);
    set_faulting(1);
    if (leaf == 7 && sub == 0) {
        d &= ~(1u << 22 | 1u << 24 | 1u << 25);                    /* AMX-BF16, -TILE, -INT8 */
        if (level >= 2) {
            b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
            c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14); /* VBMI, VBMI2, VNNI, BITALG, VPOPCNT */
            d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 23);          /* …, AVX512-FP16 */
        }
    }
    if (leaf == 7 && sub == 1) {
        a &= ~(1u << 21);                                          /* AMX-FP16 */
        if (level >= 2) a &= ~(1u << 5);                           /* AVX512-BF16 */
        if (level >= 3) { a &= ~(1u << 4 | 1u << 23); d &= ~(1u << 4 | 1u << 10); } /* AVX-VNNI, AVX-IFMA, … */
    }
    reg[REG_RAX] = a; reg[REG_RBX] = b; reg[REG_RCX] = c; reg[REG_RDX] = d;
    reg[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    const char *hide = getenv("HIDE");
    struct sigaction action;
    if (!hide) return;
    level = !strcmp(hide, "amx") ? 1 : !strcmp(hide, "avx512") ? 2 : !strcmp(hide, "vnni") ? 3 : 0;
    if (!level) { fprintf(stderr, "HIDE=%s: expected amx, avx512 or vnni\n", hide); _exit(2); }
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_CPUID, 0UL)) { perror("CPUID cannot be made to trap here"); _exit(2); }
}
