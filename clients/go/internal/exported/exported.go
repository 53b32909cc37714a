// Package exported lists the exported API of a package, for the tests that must have a row for each.
package exported

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"slices"
	"strings"
)

// Functions are the exported functions of the package in a folder: Name, and Type.Name for methods of exported types.
func Functions(folder string) ([]string, error) {
	packages, err := parser.ParseDir(token.NewFileSet(), folder, func(about fs.FileInfo) bool { return !strings.HasSuffix(about.Name(), "_test.go") }, 0)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, parsed := range packages {
		for _, file := range parsed.Files {
			for _, declaration := range file.Decls {
				if function, is := declaration.(*ast.FuncDecl); is && function.Name.IsExported() {
					if name, reached := nameOf(function); reached {
						names = append(names, name)
					}
				}
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func nameOf(function *ast.FuncDecl) (name string, reached bool) {
	if function.Recv == nil {
		return function.Name.Name, true
	}
	of := function.Recv.List[0].Type
	if pointer, is := of.(*ast.StarExpr); is {
		of = pointer.X
	}
	receiver, is := of.(*ast.Ident)
	if !is || !receiver.IsExported() {
		return "", false
	}
	return receiver.Name + "." + function.Name.Name, true
}
