// Prints the best instruction set that this processor has.
#include <cstdio>

#include "kvkernels/cpu_features.h"

int main() { std::puts(kvkernels::isa_name(kvkernels::best_isa())); }
