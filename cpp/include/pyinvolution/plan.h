// The former name of dispatch.h.
#pragma once

#pragma message("pyinvolution/plan.h is now called pyinvolution/dispatch.h")

#include "pyinvolution/dispatch.h"
