#include "kernels_impl.h"

const dynact::Table* dynact::generic_table() { return table("generic"); }
