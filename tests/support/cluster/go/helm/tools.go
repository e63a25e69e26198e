//go:build tools

// Package tools names the package manager that the tests build.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
