// One function a family adds its names to the module with; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace kd::binding {
void bind_common(pybind11::module_& module);
void bind_divergence(pybind11::module_& module);
void bind_token_stats(pybind11::module_& module);
void bind_gromov(pybind11::module_& module);
void bind_transport(pybind11::module_& module);
void bind_relation(pybind11::module_& module);
}  // namespace kd::binding
