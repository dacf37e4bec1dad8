/* Make a program believe that this CPU has AVX2 and neither AVX-512 nor VNNI nor AMX: it then takes the code that it
 * takes on such a CPU. For x86-64 Linux on CPUs whose CPUID instruction can be made to fault.
 *
 *     cc -shared -fPIC -O1 -o without_vnni.so without_vnni.c
 *     LD_PRELOAD=./without_vnni.so python ...
 *
 * Every CPUID traps; the answer of the CPU is given back without these features (Intel SDM, volume 2A, table 3-8).
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

/* Leaf 7, subleaf 0: AVX512F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS,
 * VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8. */
static const unsigned EBX_7_0 =
    BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
static const unsigned ECX_7_0 = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
static const unsigned EDX_7_0 = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
/* Subleaf 1: AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10. */
static const unsigned EAX_7_1 = BIT(4) | BIT(5) | BIT(21) | BIT(23);
static const unsigned EDX_7_1 = BIT(4) | BIT(5) | BIT(10) | BIT(19);

static void let_cpuid(int run) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, run); }

static void answer(int signal_number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
    unsigned a, b, c, d, leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
    (void)info;
    if (signal_number != SIGSEGV || instruction[0] != 0x0f || instruction[1] != 0xa2) {
        signal(SIGSEGV, SIG_DFL); /* a fault of the program itself: it comes again, and ends it */
        return;
    }
    let_cpuid(1);
    __cpuid_count(leaf, subleaf, a, b, c, d);
    let_cpuid(0);
    if (leaf == 7 && subleaf == 0) {
        b &= ~EBX_7_0;
        c &= ~ECX_7_0;
        d &= ~EDX_7_0;
    } else if (leaf == 7 && subleaf == 1) {
        a &= ~EAX_7_1;
        d &= ~EDX_7_1;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        static const char text[] = "without_vnni: CPUID cannot be made to fault on this machine\n";
        if (write(STDERR_FILENO, text, sizeof text - 1)) {}
        _exit(3);
    }
}
